"""Language (paper, section 4 and appendix E.2): choosing the next utterance of a dialogue."""
