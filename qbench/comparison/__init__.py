"""What is stored, as rows and points to compare: entries, published tables, panels, sizes."""
