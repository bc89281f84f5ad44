"""Clients of the vendors' own packages for a server of http_server.py; they try nothing twice."""

import anthropic
import openai


def openai_client(server, *, kind=openai.OpenAI, api_key="none"):
    return kind(base_url=server.url + "/v1", api_key=api_key, max_retries=0)


def anthropic_client(server, *, kind=anthropic.Anthropic, api_key="none"):
    return kind(base_url=server.url, api_key=api_key, max_retries=0)
