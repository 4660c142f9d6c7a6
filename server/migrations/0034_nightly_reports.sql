-- A nightly meditation tells each user what it promoted and deleted of theirs.

ALTER TABLE meditation_users
    ADD COLUMN promoted bigint NOT NULL DEFAULT 0 CHECK (promoted >= 0),
    ADD COLUMN deleted  bigint NOT NULL DEFAULT 0 CHECK (deleted >= 0);
COMMENT ON TABLE meditation_users IS 'What a meditation archived of whom and whether they undid it; of a nightly one also how much it promoted and deleted.';
