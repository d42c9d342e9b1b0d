"""Results as pages: HTML and Markdown, charts, film strips."""
