"""Language (paper, section 4 and appendix E.2): choose the true next utterance of a dialogue."""
