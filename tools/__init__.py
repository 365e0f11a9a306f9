"""What users run besides the lab."""
