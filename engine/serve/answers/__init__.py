"""Answers as clients get them: whole or streamed, and the parts that the APIs share."""
