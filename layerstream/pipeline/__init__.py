"""What is watched of pipelines and libraries around them: calls, changes, decorated functions."""
