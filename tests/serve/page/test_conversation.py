"""Conversations and texts on the page, from the first word to the reload."""

import re

from tests.support.servers.chat_page import CODE


class TestConversation:
    def test_a_whole_one(self, opened):
        talk = opened("talker", permissions=["clipboard-read", "clipboard-write"])
        page = talk.page
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Seed").fill("7")
        page.keyboard.press("Escape")
        talk.say("Show <b>code</b>")
        answer = talk.answered(2)
        assert page.locator(".message.user .body").inner_text() == "Show <b>code</b>"
        assert answer.locator("strong").inner_text() == "it"
        assert answer.locator("p code").inner_text() == "x < y"
        assert answer.locator("pre code").text_content() == CODE
        assert answer.locator("a").get_attribute("href") == "https://example.org/a?b=1&c=2"
        assert not answer.locator("details").evaluate("one => one.open")
        answer.locator("summary").click()
        assert answer.locator("details div").inner_text() == "It wants code."
        assert re.search(r"\d+ tokens, [\d.]+ tokens/s", answer.locator(".tools").inner_text())
        answer.get_by_role("button", name="Copy", exact=True).click()
        assert page.evaluate("navigator.clipboard.readText()") == CODE

        talk.say("Again")
        talk.answered(4)
        first, second = talk.bodies()
        assert first["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Show <b>code</b>"},
        ]
        assert (first["model"], first["temperature"], first["seed"]) == ("talker", 0.5, 7)
        assert [one["role"] for one in second["messages"]] == ["system", "user", "assistant", "user"]
        assert CODE in second["messages"][2]["content"]

        page.get_by_role("button", name="Answer again").last.click()
        talk.answered(4)
        assert talk.bodies()[-1] == second
        page.get_by_role("button", name="Edit your message").first.click()
        page.get_by_label("Edit the message").fill("Something else")
        page.locator(".edit-tools").get_by_role("button", name="Send").click()
        talk.answered(2)
        assert page.locator(".message").count() == 2
        assert talk.bodies()[-1]["messages"][1:] == [{"role": "user", "content": "Something else"}]

        page.get_by_role("button", name="New chat").click()
        talk.say("Another one")
        talk.answered(2)
        titles = page.locator("#list .open")
        assert titles.all_inner_texts() == ["Another one", "Something else"]
        titles.nth(1).click()
        assert page.locator(".message.user .body").all_inner_texts() == ["Something else"]
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Delete: Something else").click()
        assert titles.all_inner_texts() == ["Another one"]

        page.reload()
        talk.ready()
        assert page.get_by_label("Model", exact=True).input_value() == "talker"
        assert page.locator(".message").count() == 2  # of the conversation that was changed last
        assert page.locator(".message.user .body").inner_text() == "Another one"
        assert page.locator("[name=temperature]").input_value() == "0.5"

    def test_stop_in_the_middle_and_continue(self, opened):
        talk = opened("endless")
        page = talk.page
        talk.say("Go")
        page.get_by_text("w39 w0").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        answer = talk.answered(2)
        text = answer.locator(".body").inner_text()
        assert "stopped" in answer.locator(".tools").inner_text()
        page.wait_for_function("fetch('slots').then(r => r.json()).then(all => all.every(one => !one.is_processing))")
        page.get_by_role("button", name="Continue the answer").click()
        page.locator(".running").wait_for()
        page.keyboard.press("Escape")
        talk.answered(2)
        assert page.locator(".message").count() == 2
        assert talk.bodies()[-1]["messages"][-1]["content"].strip() == text
        assert answer.locator(".body").inner_text().startswith(text)

    def test_reload_in_the_middle_keeps_what_came(self, opened):
        talk = opened("endless")
        page = talk.page
        talk.say("Go")
        page.get_by_text("w39 w0").first.wait_for()
        page.reload()
        talk.ready()
        answer = page.locator(".message:nth-child(2)")
        assert "w39 w0" in answer.inner_text()
        assert "broken off" in answer.locator(".tools").inner_text()
        page.get_by_role("button", name="Answer again").click()
        page.locator(".running").wait_for()
        page.keyboard.press("Escape")
        talk.answered(2)

    def test_an_answer_goes_on_while_another_conversation_is_looked_at(self, opened):
        talk = opened("endless")
        page = talk.page
        talk.say("Go")
        page.get_by_text("w39 w0").first.wait_for()
        page.get_by_role("button", name="New chat").click()
        assert page.locator(".message").count() == 0
        page.locator("#list .open").first.click()
        page.locator(".running").wait_for()
        page.get_by_role("button", name="Stop").click()
        talk.answered(2)

    def test_errors_are_told_and_can_be_repeated(self, opened):
        talk = opened("talker")
        page = talk.page
        page.route("**/v1/chat/completions", lambda route: route.abort())
        talk.say("Hello")
        answer = talk.answered(2)
        assert "cannot be reached" in answer.locator(".error").inner_text()
        answers = {"status": 429, "headers": {"Retry-After": "3"}, "json": {"error": {"message": "The queue is full."}}}
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**answers))
        page.get_by_role("button", name="Answer again").click()
        page.locator(".error").get_by_text("The queue is full. Try again in 3 s.").wait_for()
        page.unroute("**/v1/chat/completions")
        broken = 'data: {"choices":[{"delta":{"content":"half"}}]}\n\n'
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=broken))
        page.get_by_role("button", name="Answer again").click()
        page.locator(".error").get_by_text("The connection broke before").wait_for()
        assert page.locator(".message:nth-child(2) .body").inner_text() == "half"
        page.unroute("**/v1/chat/completions")
        page.get_by_role("button", name="Answer again").click()
        page.locator(".message:nth-child(2) pre").wait_for()
        talk.answered(2)
        talk.problems.clear()  # the browser's own lines about the failures above

    def test_two_tabs_keep_both_conversations(self, opened):
        talk = opened("talker")
        other = talk.context.new_page()
        other.goto(talk.address)
        other.locator("#send:not([disabled])").wait_for()
        talk.say("From the first")
        talk.answered(2)
        other.get_by_label("Message", exact=True).fill("From the second")
        other.keyboard.press("Enter")
        other.locator(".message:nth-child(2) .tools button").first.wait_for()
        for page in (talk.page, other):
            page.locator("#list .open").nth(1).wait_for()
            assert sorted(page.locator("#list .open").all_inner_texts()) == ["From the first", "From the second"]


class TestText:
    def test_a_model_without_a_template_continues_texts(self, serving, opened):
        with serving() as address:
            talk = opened(address=address)
            page = talk.page
            text = page.get_by_label("Text: the model continues it at its end")
            assert page.get_by_role("button", name="New chat").count() == 0
            page.get_by_role("button", name="Settings").click()
            page.get_by_label("Temperature").fill("0")
            page.get_by_label("Most tokens").fill("12")
            page.keyboard.press("Escape")
            text.fill("Once upon a time")
            page.keyboard.press("Control+Enter")
            page.get_by_role("button", name="Undo").wait_for()
            first = text.input_value()
            assert first == "Once upon a time there was a little boy who lived in a little house in"
            assert re.search(r"12 tokens, [\d.]+ tokens/s", page.locator("#foot").inner_text())
            page.get_by_role("button", name="Continue").click()
            page.get_by_role("button", name="Undo").wait_for()
            assert text.input_value().startswith(first + " ")
            page.get_by_role("button", name="Undo").click()
            assert text.input_value() == first
            text.fill("The king said <b>")
            page.get_by_role("button", name="Continue").click()
            page.get_by_role("button", name="Try again").click()
            page.get_by_role("button", name="Undo").wait_for()
            assert [body["prompt"] for body in talk.bodies()][-2:] == ["The king said <b>"] * 2
            page.reload()
            talk.ready()
            assert text.input_value().startswith("The king said <b>")
