"""Vision (paper, section 4 and appendix E.1): binary image tasks, an MLP-Mixer, four retrainers."""
