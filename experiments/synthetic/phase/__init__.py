"""Phase diagrams of exact recovery by LoRA-ML: over tasks T and k/d, over samples n and k."""
