"""Figure 1: prediction error after LoRA-ML and after standard retraining, for the linear model."""
