package feed

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/smallstep/pkcs7"
)

// signable are the settings that a signature covers where the file has them, in rdpsign's order and spelling. What is
// not here, as the access token, may change without the signature breaking.
var signable = []string{
	"Full Address", "Alternate Full Address", "PCB", "Use Redirection Server Name", "Server Port", "Negotiate Security Layer",
	"EnableCredSspSupport", "DisableConnectionSharing", "AutoReconnection Enabled", "GatewayHostname", "GatewayUsageMethod",
	"GatewayProfileUsageMethod", "GatewayCredentialsSource", "Support URL", "PromptCredentialOnce", "Require pre-authentication",
	"Pre-authentication server address", "Alternate Shell", "Shell Working Directory", "RemoteApplicationProgram",
	"RemoteApplicationExpandWorkingdir", "RemoteApplicationMode", "RemoteApplicationGuid", "RemoteApplicationName",
	"RemoteApplicationIcon", "RemoteApplicationFile", "RemoteApplicationFileExtensions", "RemoteApplicationCmdLine",
	"RemoteApplicationExpandCmdLine", "Prompt For Credentials", "Authentication Level", "AudioMode", "RedirectDrives",
	"RedirectPrinters", "RedirectCOMPorts", "RedirectSmartCards", "RedirectPOSDevices", "RedirectClipboard", "DevicesToRedirect",
	"DrivesToRedirect", "LoadBalanceInfo", "RedirectDirectX", "RDGIsKDCProxy", "KDCProxyName", "EventLogUploadAddress",
}

// Header of the signature blob, before the length of the DER.
const (
	blobVersion = 0x00010001
	blobKind    = 1
)

// Sign adds signscope and signature, in the format of Windows' rdpsign: a detached CMS signature without attributes over
// the covered lines. cert is the publisher's, with its chain.
func Sign(lines []string, cert *tls.Certificate) ([]string, error) {
	message, scope := signedMessage(lines)
	sd, err := pkcs7.NewSignedData(message)
	if err != nil {
		return nil, fmt.Errorf("feed: %w", err)
	}
	if cert.PrivateKey == nil || len(cert.Certificate) == 0 {
		return nil, errors.New("feed: the signing certificate or its key is missing")
	}
	sd.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
	for i, der := range cert.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("feed: signing certificate: %w", err)
		}
		if i > 0 {
			sd.AddCertificate(c)
		} else if err := sd.SignWithoutAttr(c, cert.PrivateKey, pkcs7.SignerInfoConfig{}); err != nil {
			return nil, fmt.Errorf("feed: sign: %w", err)
		}
	}
	sd.Detach()
	der, err := sd.Finish()
	if err != nil {
		return nil, fmt.Errorf("feed: sign: %w", err)
	}
	blob := binary.LittleEndian.AppendUint32(nil, blobVersion)
	blob = binary.LittleEndian.AppendUint32(blob, blobKind)
	blob = binary.LittleEndian.AppendUint32(blob, uint32(len(der)))
	return append(lines, scope, "signature:s:"+base64.StdEncoding.EncodeToString(append(blob, der...))), nil
}

// signedMessage gives the bytes that are signed, and the line that says what they cover.
func signedMessage(lines []string) (message []byte, scope string) {
	byName := map[string]string{}
	for _, l := range lines {
		byName[nameOf(l)] = l
	}
	var covered, names []string
	for _, name := range signable {
		if l, ok := byName[strings.ToLower(name)]; ok {
			covered, names = append(covered, l), append(names, name)
		}
	}
	scope = "signscope:s:" + strings.Join(names, ",")
	return utf16le(strings.Join(append(covered, scope), "\r\n") + "\r\n\x00"), scope
}
