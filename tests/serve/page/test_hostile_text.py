"""Output of a model can become neither markup nor script; what it can become."""

import random


class TestHostileText:
    def test_output_never_becomes_markup_or_script(self, opened):
        talk = opened("hostile")
        page = talk.page
        talk.say("<img src=x onerror='window.hacked = 4'>")
        answer = talk.answered(2)
        page.get_by_role("button", name="Answer again").click()  # also where nodes of an answer are there already
        answer = talk.answered(2)
        assert page.evaluate("window.hacked") is None
        tags = set(page.evaluate("[...document.querySelectorAll('#messages *')].map(one => one.localName)"))
        assert tags <= {
            "article", "h2", "h3", "div", "p", "br", "a", "code", "pre", "figure", "figcaption", "span", "button",
            "table", "thead", "tbody", "tr", "th", "td", "blockquote", "ul", "li",
        }  # fmt: skip
        addresses = answer.locator("a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
        assert {address.split(":")[0] for address in addresses} <= {"http", "https"}
        shown = answer.locator(".body").text_content()
        for piece in (
            "<script>window.hacked = 1</script>",
            "<img src=x onerror=",
            "[a](javascript:",
            "<i>a</i>",
            "<u>head</u>",
        ):
            assert piece in shown
        assert "window.hacked=3</script>" in answer.locator("pre").last.text_content()
        page.reload()  # and when it comes out of the browser's storage
        talk.ready()
        assert page.locator(".message").count() == 2
        assert page.evaluate("window.hacked") is None

    def test_the_browser_refuses_what_the_scripts_might_overlook(self, opened):
        talk = opened("talker")
        page = talk.page
        result = page.evaluate(
            """async () => {
                const tried = {};
                const attempt = async (name, act) => {
                    try { await act(); tried[name] = "done"; } catch (error) { tried[name] = "refused"; }
                };
                await attempt("markup", () => (document.body.innerHTML += "<b>x</b>"));
                await attempt("other host", () => fetch("http://127.0.0.1:9/", { mode: "no-cors" }));
                await attempt("text as script", () => setTimeout("window.hacked = 2"));
                const script = document.createElement("script");
                await attempt("inline script", () => {
                    script.textContent = "window.hacked = 1";
                    document.body.append(script);
                });
                const style = document.createElement("p");
                style.setAttribute("style", "color: red");
                tried.style = style.style.color;
                const image = new Image();
                const loaded = new Promise((done) => {
                    image.onload = () => done("done");
                    image.onerror = () => done("refused");
                });
                image.src = "https://example.org/x.png";
                tried.image = await loaded;
                return tried;
            }"""
        )
        assert result.pop("style") == ""
        assert set(result.values()) == {"refused"}, result
        assert page.evaluate("window.hacked") is None
        talk.problems.clear()
        talk.requests.clear()

    CASES = (
        ("a\nb", "<p>a<br>b</p>"),
        ("**a *b* c** __d__ _e_ ~~f~~ ***g***",
         "<p><strong>a <em>b</em> c</strong> <strong>d</strong> <em>e</em> <s>f</s> <strong><em>g</em></strong></p>"),
        ("2 * 3 * 4, snake_case_name, **open, `code", "<p>2 * 3 * 4, snake_case_name, **open, `code</p>"),
        ("``a ` b`` \\*no\\*", "<p><code>a ` b</code> *no*</p>"),
        ("# One\n### *Two*\n###### Six", "<h3>One</h3><h5><em>Two</em></h5><h6>Six</h6>"),
        ("- a\n- b\n  - c\n\n    d\n- e\n\nf",
         "<ul><li>a</li><li>b<ul><li>c<p>d</p></li></ul></li><li>e</li></ul><p>f</p>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> a\n> > b\n\nc", "<blockquote>a<blockquote>b</blockquote></blockquote><p>c</p>"),
        ("---\n***", "<hr><hr>"),
        ("[t](https://a.b/c_d_e \"title\") [no](ftp://x) [r](/x)",
         '<p><a href="https://a.b/c_d_e">t</a> [no](ftp://x) [r](/x)</p>'),
        ("see https://a.b/c. xhttps://no.no", '<p>see <a href="https://a.b/c">https://a.b/c</a>. xhttps://no.no</p>'),
        ("![i](https://a.b/i.png)", '<p><a href="https://a.b/i.png">image: i</a></p>'),
        ("| a | b\\|c |\n|:--|--:|\n| 1 |\n| **2** | 3 | 4 |",
         "<div><table><thead><tr><th>a</th><th>b|c</th></tr></thead><tbody><tr><td>1</td><td></td></tr>"
         "<tr><td><strong>2</strong></td><td>3</td></tr></tbody></table></div>"),
        ("a | b\nc", "<p>a | b<br>c</p>"),
        ("text\n```js x\n  a\n\n<b>\n```\nend",
         "<p>text</p><figure>js|<pre><code>  a\n\n&lt;b&gt;</code></pre></figure><p>end</p>"),
        ("````\n```\n````", "<figure>text|<pre><code>```</code></pre></figure>"),
        ("1. a\n   ```\n   x\n     y\n   ```\n2. b",
         "<ol><li>a<figure>text|<pre><code>x\n  y</code></pre></figure></li><li>b</li></ol>"),
        ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
        ("", ""),
        ("\n\n \n", ""),
    )  # fmt: skip
    SHOW = """async ([texts, pieces]) => {
        const { show } = await import("./static/markdown.js");
        const kept = new Set(["href", "start"]);
        return texts.map((text) => {
            const node = document.createElement("div");
            if (pieces) for (let i = 0; i < text.length; i++) show(node, text.slice(0, i));
            show(node, text);
            for (const one of node.querySelectorAll("figcaption")) one.replaceWith(one.firstChild.textContent + "|");
            for (const one of node.querySelectorAll("*"))
                for (const { name } of [...one.attributes]) if (!kept.has(name)) one.removeAttribute(name);
            return node.innerHTML;
        });
    }"""

    def test_markdown(self, opened):
        page = opened("talker").page
        texts, expected = zip(*self.CASES, strict=True)
        assert page.evaluate(self.SHOW, [texts, False]) == list(expected)
        assert page.evaluate(self.SHOW, [texts, True]) == list(expected)  # as it grows, letter by letter

    def test_any_text_ends_in_known_nodes(self, opened):
        """Random pieces of markdown and markup; the tags and attributes that come of them are those of the renderer."""
        page = opened("talker").page
        draw = random.Random(20)
        pieces = ["*", "**", "_", "`", "```", "~~~", "\n", "\n\n", "  ", "- ", "1. ", "> ", "# ", "|", "|---|", "[",
                  "](", ")", "<script>", "<a href=javascript:1 onclick=1>", "javascript:", "https://a.b", "\\", "!",
                  "a", "é", "\u202e", "\0", "&lt;", "\t", "'", '"']  # fmt: skip
        texts = ["".join(draw.choices(pieces, k=draw.randint(1, 40))) for _ in range(1500)]
        found = page.evaluate(
            """async (texts) => {
                const { show } = await import("./static/markdown.js");
                const found = new Set();
                for (const text of texts) {
                    const node = document.createElement("div");
                    show(node, text);
                    for (const one of node.querySelectorAll("*"))
                        for (const { name, value } of one.attributes)
                            found.add(`${one.localName} ${name} ${name === "href" ? new URL(value).protocol : ""}`);
                    for (const one of node.querySelectorAll("*")) found.add(one.localName);
                }
                return [...found];
            }""",
            texts,
        )
        tags = {one for one in found if " " not in one}
        assert tags <= {
            "p", "br", "strong", "em", "s", "code", "pre", "figure", "figcaption", "span", "button", "a", "ul", "ol",
            "li", "blockquote", "hr", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "div",
        }  # fmt: skip
        attributes = {tuple(one.split(" ")[1:]) for one in found if " " in one}
        names = {name for name, _ in attributes}
        assert names <= {"dir", "class", "tabindex", "type", "role", "aria-label", "href", "rel", "target", "start"}
        assert {value for name, value in attributes if name == "href"} <= {"http:", "https:"}

    def test_repetition_does_not_hang_the_page(self, opened):
        page = opened("talker").page
        pieces = ["*", "*a ", "**a", "_a ", "`", "``a`", "[", "[a](", "[](x", "<", "> ", "- ", "  - a\n", "|",
                  "| a\n|---\n", "~~~\n", "```a", "# ", " ", "https://a.", "\\", "![", "a\n\n", "~~a ", "1. ", "***a",
                  "- - "]  # fmt: skip
        for piece in pieces:
            many = piece * (30_000 // len(piece))
            for text in (many, many + "x`", "```" + many + "`"):
                page.evaluate(
                    """(text) => setTimeout(async () => {
                        const { show } = await import("./static/markdown.js");
                        show(document.createElement("div"), text);
                        window.shown = text;
                    })""",
                    text,
                )
                page.wait_for_function("(text) => window.shown === text", arg=text, timeout=60_000)
