"""The command line around `main.py`: commands and their help, named configurations, the process."""
