"""Who is told of a run's records beside the run folder's own files: a file each."""
