"""What mkdocs does beyond its plugins: notebooks load no script from the network (there are no formulas and diagrams in them)."""

import re

FOREIGN = re.compile(
    r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->|<script type=\"module\">(?:(?!</script>).)*mermaid.*?</script>", re.S
)


def on_page_content(html: str, page, **_) -> str:
    """A page without the scripts that notebooks would load."""
    return FOREIGN.sub("", html) if page.file.src_uri.endswith(".ipynb") else html
