"""What the steps share and what knows no network."""
