"""The one exception torchslice raises for something its user can mend."""


class TorchsliceError(ValueError):
    """Bad input, a model that cannot be handled, or a file that cannot be read or written.

    The text says what was given, what is allowed and what to do; the command line prints it as one line and exits
    with 2.
    """
