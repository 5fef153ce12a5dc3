"""What the experiments share: the command line, run folders, figures, training."""
