-- Whoever signed up before has an email and is at home: a look at all of them, beside which they go
-- on.
ALTER TABLE users VALIDATE CONSTRAINT users_home;
ALTER TABLE users VALIDATE CONSTRAINT users_email_is_the_homes;
