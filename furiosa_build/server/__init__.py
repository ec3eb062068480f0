"""An artifact as a service over HTTP: OpenAI's routes and shark's. Needs the extra `serve`; engines do not need it."""
