"""The OpenAI API's requests and answers."""
