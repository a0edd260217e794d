"""mmjax: multimodal sentiment and emotion systems in JAX, each selected by a gin file."""
