"""The main job: comparing models."""
