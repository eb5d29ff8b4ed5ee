"""What a run would take on machines that are not there yet: memory, time, failures."""
