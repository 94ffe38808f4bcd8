"""Jobs of many prompts: rows are read from files, answered by workers on one machine or many, and written in parts."""
