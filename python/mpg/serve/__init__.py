"""A server of OpenAI's API in front of one combination of models: any weights in every request, one batch for all."""

from mpg.serve.deploy import Scale, deployment

__all__ = ["Scale", "deployment"]
