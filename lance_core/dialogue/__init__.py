"""Questions and answers: conversations about pictures and clips, and how well a picture fits a text."""
