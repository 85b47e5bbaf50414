"""What `newllm bench` measures: models and layers against each other and against rivals, in rounds."""
