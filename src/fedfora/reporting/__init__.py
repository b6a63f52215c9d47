"""Run directories and what a person sees of a run."""
