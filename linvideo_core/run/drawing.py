"""The colours and the face of every picture: plots, a file's own picture, previews."""

from pathlib import Path

INK, QUIET, PAPER = "#222222", "#767676", "#ffffff"
BLUE, VERMILION = "#0072B2", "#D55E00"


def find_font(*, bold: bool = False) -> Path:
    """Locate DejaVu Sans, which matplotlib carries on every system."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path()) / "fonts/ttf" / name
