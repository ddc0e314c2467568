"""diffusers: which models are known, how they are patched, and how they are run."""
