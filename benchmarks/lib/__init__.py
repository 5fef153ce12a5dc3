"""What the commands of benchmarks/ share; nothing here is run by itself."""
