"""From images to predictions and files."""
