"""Scoring candidates, and one file per benchmark."""
