"""Does a compressed cache keep the answers right? Problems, runs and reports."""
