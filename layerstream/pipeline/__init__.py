"""The user's side of streaming: who streams what, what is watched of pipelines and libraries, what is told."""
