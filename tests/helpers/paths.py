"""Where the checkout lies, and the material that some tests read beside it (tests skip where it is absent)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
