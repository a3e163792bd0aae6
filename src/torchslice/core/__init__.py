"""What every part of torchslice stands on: finding neurons, holding them at zero, cutting them out."""
