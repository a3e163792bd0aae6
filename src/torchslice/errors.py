"""The one exception torchslice raises for something its user can mend."""


class TorchsliceError(ValueError):
    """Bad input, a model or a file that cannot be handled: what was given, what is allowed and what to do.

    The command line prints it as one line and exits with 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its type if it says nothing.

    >>> first_line(AssertionError())
    'AssertionError'
    """
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
