"""The experiment: the same model brought up in several ways, side by side, and its parts.

Nothing is imported here, so that the command line can ask for help without loading torch.
"""
