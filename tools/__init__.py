"""What users run besides the lab's steps: `python -m tools.NAME` from the project's folder."""
