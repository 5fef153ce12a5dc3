"""Appendix D.2: the same as Figure 1 for the shallow network."""
