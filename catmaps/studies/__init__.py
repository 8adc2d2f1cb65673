"""Studies: grids of small trainings described in JSON, run, measured, compared."""
