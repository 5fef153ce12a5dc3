"""What a training raises when it fails by itself."""


class DivergedError(FloatingPointError):
    """A training whose loss is NaN or infinite."""
