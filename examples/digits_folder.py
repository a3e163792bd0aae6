"""Write scikit-learn's digits as image files, one folder per class: python digits_folder.py DIR."""

import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def write(folder: Path, count: int = 1797) -> None:
    """Write the first `count` digits as 32 x 32 pixel PNG files."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images[:count], digits.target[:count], strict=True)):
        path = folder / f"digit{label}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((32, 32)).save(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
