"""One run of a command: settings, device, folder, files, progress, memory, tables. No model."""
