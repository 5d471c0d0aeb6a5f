"""Train any task on any number of processes; nothing here knows attention."""
