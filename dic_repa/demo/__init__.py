"""`dic-repa demo`: a local page to sample from checkpoints. All but `page` and `server` do without Gradio."""
