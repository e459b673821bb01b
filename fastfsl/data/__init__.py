"""Image folders, split files, feature files, few-shot episodes and prompt templates."""
