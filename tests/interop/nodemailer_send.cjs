// Sends with nodemailer what standard input says, and reports on standard output what nodemailer reported.
// In: {"options": transport options, "mails": [message, ...]}. Out: one report for each message, as JSON.
"use strict";
const nodemailer = require("nodemailer");

async function send(transport, mail) {
  try {
    const info = await transport.sendMail(mail);
    const errors = (info.rejectedErrors || []).map((error) => error.response);
    return { ok: true, text: [info.response, ...errors].join("\n"), refused: info.rejected };
  } catch (error) {
    return { ok: false, text: `${error.code} ${error.responseCode} ${error.response}`, refused: error.rejected || [] };
  }
}

async function main() {
  const chunks = [];
  for await (const chunk of process.stdin) chunks.push(chunk);
  const { options, mails } = JSON.parse(Buffer.concat(chunks).toString("utf8"));
  const transport = nodemailer.createTransport(options);
  const reports = [];
  for (const mail of mails) reports.push(await send(transport, mail));
  transport.close();
  process.stdout.write(JSON.stringify(reports));
}

main().catch((error) => {
  process.stderr.write(`${error.stack}\n`);
  process.exitCode = 1;
});
