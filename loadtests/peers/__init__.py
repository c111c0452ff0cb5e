"""This service beside what else one would build around its model."""
