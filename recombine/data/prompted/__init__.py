"""Pictures with prompts, for models that draw what a prompt says."""
