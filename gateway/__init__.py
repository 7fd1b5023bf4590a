"""The HTTP edge: partners, police and map apps, and nobody else."""
